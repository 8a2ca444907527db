"""The entry point by which lmms-eval finds the model ``mixlora_llava``; lmms-eval is optional, and imports this."""


def manifest():
    """The model's ``ModelManifest``, for the entry-point group ``lmms_eval.models``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mixlora_llava", simple_class_path="mixlora_llava.lmms.model.MixLoRALlava")
