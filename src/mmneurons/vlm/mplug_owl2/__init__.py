"""mPLUG-Owl2 as a model of transformers, which has none: checkpoints are read as its authors published them.

Written from what their code computes (github.com/X-PLUG/mPLUG-Owl, Ye et al., CVPR 2024); the names of the modules are
those of the published weights. Importing this package tells transformers of the type.
"""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from mmneurons.vlm.mplug_owl2.config import MplugOwl2Config
from mmneurons.vlm.mplug_owl2.model import MplugOwl2ForConditionalGeneration
from mmneurons.vlm.mplug_owl2.processor import MplugOwl2Processor

AutoConfig.register(MplugOwl2Config.model_type, MplugOwl2Config, exist_ok=True)
AutoModelForImageTextToText.register(MplugOwl2Config, MplugOwl2ForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MplugOwl2Config, MplugOwl2Processor, exist_ok=True)
