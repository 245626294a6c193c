# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""How good captions are, and how they come about."""
