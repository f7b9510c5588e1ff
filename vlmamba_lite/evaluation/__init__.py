"""Old names of `vlmamba_lite.evaluation`, until everything imports from the modules of this room."""
from functools import partial

from vlmamba_lite.evaluation.answers import *
from vlmamba_lite.evaluation.answers import answer, baselines as floors, conversation_samples as talk_samples
from vlmamba_lite.evaluation.metrics import *

decode_answer, decode_plain = "exact", "plain"


def answers_of(model, max_new_tokens=16, decode=decode_plain):
    return partial(answer, model, batch_size=2 ** 20, max_new_tokens=max_new_tokens, exact=decode == decode_answer)
