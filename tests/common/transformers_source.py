# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Makes the common tests in a source tree of Transformers importable, as its own package `tests`.

A source distribution holds the mixins and not the folders beside them, and a git checkout must give the same result:
so what the mixins import from those folders is replaced here, whichever of the two is given.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import transformers
from transformers.models.auto import modeling_auto


HOW_TO = (
    "needs a source tree of Transformers: `pip download --no-deps --no-binary transformers "
    f"transformers=={transformers.__version__}`, unpack it, `pip install parameterized`, and run `pytest tests/common "
    "--transformers-src FOLDER`"
)

# The models are listed where those within Transformers are: the common tests look up there what a class is for.
NAMES = {
    "MODEL_MAPPING_NAMES": "TDDModel",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "TDDForImageClassification",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "TDDForCaptioning",
}


def require_source() -> None:
    """Skips a test module unless a source tree was given."""
    if "tests.test_modeling_common" not in sys.modules:
        pytest.skip(HOW_TO, allow_module_level=True)


def provide(name: str, **attributes: Any) -> None:
    """Makes a module of these attributes importable."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def install(source: Path) -> None:
    """Imports the mixins of a source tree.

    Raises:
        `pytest.UsageError`: if the folder is no source tree of the installed version of Transformers.
    """
    version_file = source / "src" / "transformers" / "__init__.py"
    if not (source / "tests" / "test_modeling_common.py").is_file() or not version_file.is_file():
        raise pytest.UsageError(f"--transformers-src: {source} has no `tests/test_modeling_common.py`: {HOW_TO}")
    if f'__version__ = "{transformers.__version__}"' not in version_file.read_text(encoding="utf-8"):
        raise pytest.UsageError(f"--transformers-src: {source} is not of the installed version: {HOW_TO}")

    provide("tests", __path__=[str(source / "tests")])
    # Of the exporters and of autoregressive generation: see tests/test_deployment.py and tests/test_generation.py
    provide("tests.exporters", __path__=[])
    provide("tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    provide("tests.generation", __path__=[])
    provide("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    # Read for configurations without sub-configurations alone
    provide("tests.utils", __path__=[])
    provide("tests.utils.test_configuration_utils", config_common_kwargs={})
    provide("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)

    for mapping, name in NAMES.items():
        getattr(modeling_auto, mapping)["tdd"] = name
    with installed_transformers():
        import tests.test_configuration_common  # noqa: F401
        import tests.test_image_processing_common  # noqa: F401
        import tests.test_modeling_common  # noqa: F401
        import tests.test_processing_common  # noqa: F401


@contextmanager
def installed_transformers() -> Iterator[None]:
    """The mixins would import Transformers a second time, from the tree, in place of the installed one."""
    with mock.patch("transformers.utils.direct_transformers_import", lambda path: transformers):
        yield


def load_pipeline_mixin(tiny_models: Path, **test_classes: type) -> type:
    """PipelineTesterMixin, which reads its checkpoints from a folder, and for each task a class that it calls."""
    provide("tests.pipelines", __path__=[])
    for task, test_class in test_classes.items():
        provide(f"tests.pipelines.test_pipelines_{task}", **{test_class.__name__: test_class})
    os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(tiny_models)
    with installed_transformers():
        from tests.test_pipeline_mixin import PipelineTesterMixin
    return PipelineTesterMixin
