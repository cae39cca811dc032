"""A custom task: rows in a CSV file, described by a few lines of TOML."""

from __future__ import annotations

from pathlib import Path

import fedbpt

DATA = Path(__file__).parents[1] / "docs" / "tutorials" / "support"

if __name__ == "__main__":
    fedbpt.models.pull("smollm2-135m")
    scorer = fedbpt.load_model("smollm2-135m")
    # Labels, templates and columns. `fedbpt tasks new train.csv` drafts such a file.
    task = fedbpt.tasks.load(DATA / "support.toml")
    result = fedbpt.tune(scorer, task, DATA / "train.csv", budget=fedbpt.Budget(evaluations=200), seed=7)
    for name, options in {"zero-shot": {"template": result.template}, "tuned": {"prompt": result.prompt}}.items():
        print(name, fedbpt.evaluate(scorer, task, DATA / "test.csv", **options))
    result.prompt.save("support.safetensors")
