"""The plugin that lets vLLM serve Video-Panda. vLLM finds it by the entry point `vllm.general_plugins`."""

ARCHITECTURE = "VideoPandaForConditionalGeneration"


def register() -> None:
    """Tells vLLM where Video-Panda's class is. vLLM calls it in each of its processes, and imports the class only to
    serve such a model."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
