"""The HTTP routes, one module for each part of the API; every module makes a router."""
