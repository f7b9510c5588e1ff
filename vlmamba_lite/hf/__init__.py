"The classes of transformers. Importing this package registers them, so that `pipeline` and the Auto classes find them."
from .modeling import VLMambaForConditionalGeneration
from .modeling import VLMambaHFConfig as VLMambaConfig      # by its usual name here; the library's own is `VLMamba`'s
from .processing import VLMambaImageProcessor, VLMambaProcessor

__all__ = ["VLMambaConfig", "VLMambaForConditionalGeneration", "VLMambaImageProcessor", "VLMambaProcessor"]
