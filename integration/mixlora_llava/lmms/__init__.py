"""A LLaVA with an adapter, as a model of lmms-eval. lmms-eval is optional. It finds the model through an entry point,
which is ``manifest``. Importing this module imports nothing else."""


def manifest():
    """The model's ``ModelManifest``, for the entry-point group ``lmms_eval.models``.

    Raises:
        ImportError: lmms-eval is not installed, or its version has no manifests of models (before 0.7).
    """
    try:
        from lmms_eval.models.registry_v2 import ModelManifest
    except ImportError as error:
        raise ImportError("the model mixlora_llava needs lmms-eval 0.7 or later: pip install lmms_eval") from error
    return ModelManifest(model_id="mixlora_llava", simple_class_path="mixlora_llava.lmms.model.MixLoRALlava")
