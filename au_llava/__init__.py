"""AU-LLaVA: facial Action Units from a face image and a text description.

The project's files lie at the repository root, because the root is also the Hub repository. This folder makes them
importable: in a checkout it adds the root to the package's search path; in an installed wheel they lie beside it.

>>> from au_llava import AuLlavaConfig, AuLlavaForConditionalGeneration, AuLlavaProcessor
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


__version__ = "0.1.0"

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "modeling_au_llava.py").is_file():
    __path__.append(str(_ROOT))


_HOMES = {
    "AuLlavaConfig": "configuration_au_llava",
    "AuLlavaModel": "modeling_au_llava",
    "AuLlavaForConditionalGeneration": "modeling_au_llava",
    "AuLlavaProcessor": "processing_au_llava",
    "FacialActionUnitPipeline": "pipeline_au_llava",
    "ActionUnit": "action_units",
}
__all__ = ["__version__", "default_checkpoint", *_HOMES]


def default_checkpoint() -> str:
    """The folder of the checkpoint that comes with the package: the repository root, or the installed package."""
    spec = find_spec(f"{__name__}.configuration_au_llava")
    assert spec and spec.origin  # it lies beside this file, or in the folder added above
    return str(Path(spec.origin).parent)


@cache
def _register() -> None:
    """Let the Auto classes and `pipeline` find AU-LLaVA without `trust_remote_code`: this code is here already."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
    from transformers.pipelines import PIPELINE_REGISTRY

    config, model, processor, pipeline = (
        getattr(import_module(f".{_HOMES[name]}", __name__), name)
        for name in (
            "AuLlavaConfig",
            "AuLlavaForConditionalGeneration",
            "AuLlavaProcessor",
            "FacialActionUnitPipeline",
        )
    )
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForImageTextToText.register(config, model, exist_ok=True)
    AutoProcessor.register(config, processor, exist_ok=True)
    PIPELINE_REGISTRY.register_pipeline(
        "facial-action-units", pipeline_class=pipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
    )


def __getattr__(name: str):
    # torch and transformers take seconds to import; tools that need neither, such as the renderer, should not wait.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "ActionUnit":
        _register()
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
