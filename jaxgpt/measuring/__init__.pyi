from . import benchmark as benchmark
from . import peers as peers
from .doctor import examine as examine
