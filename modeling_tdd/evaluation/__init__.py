# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Metrics of captions, baselines, and plots of the scores and of the denoising."""
