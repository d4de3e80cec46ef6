"""POST /v1/completions: its body, what it becomes, and how the answer is written."""
