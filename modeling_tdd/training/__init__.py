# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""The code that the training scripts share: recipes, data, the loop, results. Needs `pip install
modeling_tdd[train]`."""
