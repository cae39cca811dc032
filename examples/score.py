"""Scoring without tuning: logits of a few tokens after texts, under your own soft prompts."""

from __future__ import annotations

import numpy as np

import fedbpt

if __name__ == "__main__":
    fedbpt.models.pull("smollm2-135m")
    scorer = fedbpt.load_model("smollm2-135m")
    texts = [scorer.tokenize(f"{text}\nSentiment:") for text in ("A wonderful film.", "A waste of time.")]
    labels = [scorer.tokenize(word)[0] for word in (" positive", " negative")]
    random = np.random.default_rng(0).standard_normal((2, 5, scorer.n_embd), dtype=np.float32)
    prompts = 0.02 * random  # two candidates of five embedding rows each
    plain = scorer.score_with_soft_prompt(texts, prompts[:1, :0], labels)
    tuned = scorer.score_with_soft_prompt(texts, prompts, labels)
    print("without a prompt [texts, labels]:", plain[0].round(2).tolist())
    print("with two prompts [prompts, texts, labels]:", tuned.round(2).tolist())
