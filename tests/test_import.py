# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What `import modeling_tdd` costs: its own few files, beside what Transformers' Auto classes load anyway."""

import json
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
FLAT_MODULES = sorted(path.stem.removesuffix("_tdd") for path in (ROOT / "modeling_tdd").glob("*_tdd.py"))

# What any user of a checkpoint imports of Transformers. Registering takes the Auto classes' modules, which take torch
# and Transformers' base classes: there is next to nothing left that could be imported later.
TRANSFORMERS_PARTS = """
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, AutoModelForImageTextToText
from transformers import AutoProcessor, GenerationConfig, LogitsProcessorList
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pipelines import PIPELINE_REGISTRY, ImageTextToTextPipeline
"""


def test_import_adds_its_own_modules_and_next_to_nothing_else(tmp_path: Path) -> None:
    script = f"""
import json, sys
{TRANSFORMERS_PARTS}
before = set(sys.modules)
import modeling_tdd
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    added = set(json.loads(done.stdout.splitlines()[-1]))
    own = {name for name in added if name.split(".")[0] == "modeling_tdd"}
    # Training, evaluation and publishing, and what they need (datasets, timm, matplotlib), load when they are used
    assert own == {"modeling_tdd"} | {f"modeling_tdd.{name}_tdd" for name in FLAT_MODULES}
    others = added - own
    assert len(others) <= 10 and {name.split(".")[0] for name in others} <= {"transformers"}, others
