from .token_files import check_tokens as check_tokens
from .token_files import open_tokens as open_tokens
from .token_files import read_text as read_text
from .tokens import Ids as Ids
from .tokens import Tokens as Tokens
