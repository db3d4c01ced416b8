"""Every error raised on purpose, in the lowest room so that all may raise it.

ShardwiseError                 exit 1: ours to mend
├── UserError (ValueError)     exit 2: the user's mistake, in one line: what, the rule, the way out
│   ├── BadModel               a model that cannot be read or is not supported
│   ├── BadLayout              a layout that does not exist, or does not fit the model or the machine
│   ├── BadRecipe              a YAML file with an unknown key or a value out of range
│   ├── BadRequest             a prompt or a sampling parameter out of range
│   └── PlacementFailed        the cluster cannot hold the gang: need / have / who holds it
├── NoFeasiblePlan             exit 3: every candidate was rejected; the message says how to get one
├── Overloaded                 exit 1: the queue is full; come again after `retry_after_s`
├── Draining                   exit 1: it finishes what it has and takes nothing new
├── DeadlineExceeded           exit 1: the request's own time was over before its answer was
├── AttemptsSpent              exit 1: the replicas that ran a request died, each time; it is not run again
├── NotFinite                  exit 1: the model's numbers for a request overflowed; another try gives the same
├── WorkerFailed               exit 1: a worker raised what nobody expected; its traceback is a note
└── GangDied                   exit 1: a worker died or stopped; the message ends with its last words
"""

from __future__ import annotations


class ShardwiseError(Exception):
    exit_code = 1


class UserError(ShardwiseError, ValueError):
    exit_code = 2


class BadModel(UserError):
    pass


class BadLayout(UserError):
    pass


class BadRecipe(UserError):
    pass


class BadRequest(UserError):
    pass


class PlacementFailed(UserError):
    pass


class NoFeasiblePlan(ShardwiseError):
    exit_code = 3


class Overloaded(ShardwiseError):
    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(ShardwiseError):
    pass


class DeadlineExceeded(ShardwiseError):
    pass


class AttemptsSpent(ShardwiseError):
    pass


class NotFinite(ShardwiseError):
    pass


class WorkerFailed(ShardwiseError):
    pass


class GangDied(ShardwiseError):
    was_killed = (
        False  # or stopped, by a signal that nothing it ran sent: a person did, or a kernel short of memory
    )
