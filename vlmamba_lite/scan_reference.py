from .ops.reference import *
