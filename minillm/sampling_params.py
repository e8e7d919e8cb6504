"""How tokens are sampled, with limits.

    params = SamplingParams(max_new_tokens=64, temperature=0.8, top_k=50)

Nothing here imports torch: a wrong flag is reported at once, without a second of loading.
"""
import math
from dataclasses import dataclass, replace
from functools import cached_property

from minillm.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """One request's settings. Raises UserError for a value out of range (a NaN too)."""
    max_new_tokens: int = 256              # most tokens to make
    temperature: float = 1.0               # 0: greedy; 1: the model's own distribution
    top_k: int = 0                         # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0                     # sample from the likeliest with this total probability
    repetition_penalty: float = 1.0        # above 1: tokens that have occurred become less likely

    def __post_init__(self):
        if not self.max_new_tokens >= 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be 0 or more")
        if not self.top_k >= 0:
            raise UserError(f"top_k={self.top_k} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be at least 0.01 "
                            "and at most 100")

    def for_sample(self):
        """The arguments of sampling.sample after the logits and u; a new rule's belong here too."""
        return self.temperature, self.top_k, self.top_p

    @cached_property                     # asked for every row in every step of a server
    def without_length(self):
        """What two requests must share to be drawn together, or by the same CUDA graph."""
        return replace(self, max_new_tokens=1)


# of sample.py, chat.py, serve.py and GPT.chat; GPT.generate has those of SamplingParams, which
# leave the model's distribution as it is
DEFAULTS = SamplingParams(temperature=0.8, top_k=50)
