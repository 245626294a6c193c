# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Makes the model cards of trained runs for scripts/publish.py."""
