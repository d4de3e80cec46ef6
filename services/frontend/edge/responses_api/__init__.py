"""POST /v1/responses, without state: its body, what it becomes, and how the answer is written."""
