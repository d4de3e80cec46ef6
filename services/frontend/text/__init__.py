"""Text on the way in and out: chat template, tokenizer, detokenizer, stop strings. No torch, no transformers."""

from services.frontend.text.chat_template import ChatMessage, ChatTemplate, ChatTemplateError, InvalidMessagesError
from services.frontend.text.detokenizer import IncrementalDetokenizer
from services.frontend.text.output import TextDelta, TextOutput
from services.frontend.text.stop_strings import StopResult, StopStringMatcher
from services.frontend.text.template_sandbox import TemplateLimits
from services.frontend.text.token_bytes import token_bytes
from services.frontend.text.tokenizer import InvalidTextError, TextTokenizer, TokenizerError

__all__ = [
    "ChatMessage",
    "ChatTemplate",
    "ChatTemplateError",
    "IncrementalDetokenizer",
    "InvalidMessagesError",
    "InvalidTextError",
    "StopResult",
    "StopStringMatcher",
    "TemplateLimits",
    "TextDelta",
    "TextOutput",
    "TextTokenizer",
    "TokenizerError",
    "token_bytes",
]
