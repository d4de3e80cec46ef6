"""The life of one request in the frontend.

- `api`: what the edges see
- `prepare`: checks, chat template, tokenization; `chat`: the checks of messages and tools
- `chat_answer`: which parsers and which grammar a chat's answer has; `reply`: tokens to text, reasoning and tool calls
- `choices`: how many answers it asks for, and the seed of each
- `fan_out`: the request as its client sees it: an owner for each choice, one stream
- `owner`: the one task that owns a choice, from the wait for workers to its end
- `places`: which workers its attempts get
- `events`: what an owner hears, and whom it tells; `mailbox`: items for one reader
- `states`: the states of a request and every allowed step between them
- `attempt`: one attempt: both legs on one pair, and how they are ended
- `blame`: by whom an attempt has failed
- `retry`: which failures other workers may cure
- `migration`: how an answer goes on elsewhere behind its first token
- `answer`: tokens in, outputs out, times of the phases
- `outbox`: outputs that the client has not taken yet, bounded
- `deadlines`: how long each phase may take
- `report`, `trace`: what is told of it when it has ended
"""
