"""The frontend: takes requests, chooses workers, runs both legs, streams the answer.

- `process`: signals and exit; `server`: composition; `service`: every live request, admission, drain
- `request/`: the life of one request: preparation, owner task, outputs
- `dispatch/`: the queue for decode's credits, and the proof of pairs
- `embedding/`: embeddings, which need no queue
- `router/`: which workers there are, and which pair runs a request
- `link/`: how a leg reaches its worker
- `text/`: tokenizer, chat template, detokenizer, stop strings
- `parsers/`: reasoning and tool calls in the text of an answer
- `text_models`: tokenizers fetched from workers
- `servicers/`: gRPC; `edge/`: the OpenAI HTTP API
"""
