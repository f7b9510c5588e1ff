"Conversations and pictures to batches. (Transition: every name of the former module `vlmamba_lite.data`; this file is emptied at the end.)"
from functools import partial

from .batches import *
from .checks import *
from .conversations import *
from .conversations import ERROR_KINDS as FAULTS
from .conversations import sample_error as fault
from .easy_vqa import *
from .pictures import *
from .records import *
from .sort_of_clevr import *


def encode_turn(tokenizer, question, answer):
    "One question and its answer as (input_ids, labels) of a row of the template `lite`. Raises a `ValueError` that names the turn."
    row, = encode_conversation(Conversation(repr(question), [], [(question, answer)]), tokenizer, "lite")
    return row.input_ids, row.labels


def select_state(state, rows):
    "Now in `model.vlmamba`."
    from vlmamba_lite.model.vlmamba import select_state
    return select_state(state, rows)


def batch_loss(language, batch, see=None):
    "Now `VLMamba.forward(batch).loss`."
    from torch.nn import Module

    from vlmamba_lite.model.vlmamba import VLMamba
    reader = VLMamba.__new__(VLMamba)
    Module.__init__(reader)
    reader.language, reader.__dict__["see"] = language, see
    return reader(batch).loss
