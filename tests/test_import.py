# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""What `import modeling_tdd` costs: its own few files, beside what Transformers' Auto classes load anyway.

`python scripts/benchmark.py import` has the times.
"""

import json
import runpy
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parent.parent
FLAT_MODULES = sorted(path.stem.removesuffix("_tdd") for path in (ROOT / "modeling_tdd").glob("*_tdd.py"))


def test_import_adds_its_own_modules_and_next_to_nothing_else(tmp_path: Path) -> None:
    parts = runpy.run_path(str(ROOT / "scripts/benchmark.py"))["TRANSFORMERS_PARTS"]
    script = f"""
import json, sys
{parts}
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
