from . import benchmark as benchmark
from . import peers as peers
from . import workloads as workloads
from .doctor import examine as examine
