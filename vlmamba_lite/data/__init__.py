"Conversations and pictures to batches. (Transition: every name of the former module `vlmamba_lite.data`; this file is emptied at the end.)"
from functools import partial

from .batches import *
from .batches import _begin
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


def place(mixture, n):
    "Old name of `Mixture.place`."
    return mixture.place(n)
