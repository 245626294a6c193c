# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Transformers' own common tests on our models; they come from a source tree, `--transformers-src`."""

from pathlib import Path

import pytest
import transformers_source


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "is_pipeline_test: of Transformers")
    source = config.getoption("--transformers-src")
    if source is not None:
        transformers_source.install(Path(source))
