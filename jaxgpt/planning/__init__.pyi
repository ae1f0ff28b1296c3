from .chips import Topology as Topology
from .plan import ANALYTIC_ERROR as ANALYTIC_ERROR
from .plan import HOST as HOST
from .plan import attention as attention
from .plan import compiler_available as compiler_available
from .plan import host_takes as host_takes
from .plan import make_plan as make_plan
from .plan import resolve as resolve
