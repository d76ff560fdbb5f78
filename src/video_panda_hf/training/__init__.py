"""Training Video-Panda with `transformers.Trainer`: arguments, data, collator, trainer, distillation."""

from .arguments import VideoPandaTrainingArguments
from .checkpoints import last_complete_checkpoint
from .collator import BadSampleError, VideoPandaDataCollator
from .data import ConversationError, ConversationReport, load_conversations
from .distillation import (
    HEAD_FILE,
    VideoPandaDistillationHead,
    VideoPandaTeacher,
    attach_distillation_head,
    distillation_loss,
)
from .languagebind import LanguageBindVideoTower
from .parts import LANGUAGE_MODEL_LINEARS, STAB_AND_PROJECTOR, freeze_parts, keep_in_step
from .preferences import VideoPandaPreferenceCollator, load_preferences
from .trainer import VideoPandaTrainer


__all__ = [
    "HEAD_FILE",
    "LANGUAGE_MODEL_LINEARS",
    "STAB_AND_PROJECTOR",
    "BadSampleError",
    "ConversationError",
    "ConversationReport",
    "LanguageBindVideoTower",
    "VideoPandaDataCollator",
    "VideoPandaDistillationHead",
    "VideoPandaPreferenceCollator",
    "VideoPandaTeacher",
    "VideoPandaTrainer",
    "VideoPandaTrainingArguments",
    "attach_distillation_head",
    "distillation_loss",
    "freeze_parts",
    "keep_in_step",
    "last_complete_checkpoint",
    "load_conversations",
    "load_preferences",
]
