"""POST /v1/chat/completions: its body, what it becomes, and how the answer is written."""
