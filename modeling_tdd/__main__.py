# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""`python -m modeling_tdd`: the command `tdd`."""

import sys

from tdd_cli import main


sys.exit(main())
