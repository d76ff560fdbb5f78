"""Video-Panda for lmms-eval, which finds it by the entry point `lmms_eval.models` as `--model video_panda`."""


def manifest():
    """Where Video-Panda's class is. lmms-eval imports the class only to run it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("video_panda", chat_class_path=f"{__name__}.model.VideoPanda")
