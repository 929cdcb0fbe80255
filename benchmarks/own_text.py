"""Compare edits with statistics of a text and with statistics of text that the model samples itself.

    python benchmarks/own_text.py --model PATH --text FILE --data FILE [--edits 100] [--methods rome,memit,alphaedit]

Makes the first edits of a CounterFact file one after another for each method, corpus and number of tokens, without a
restraint, and prints a table of efficacy (exact match), paraphrase (success), locality (agreement with the unedited
model), and drift (KL, nats per token). Rows are printed as they are done. Each row's number of tokens holds for every
method: `method.tokens_per_feature`, by which ROME and MEMIT take fewer, is off.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from prune_lightning.cli import config_folder
from prune_lightning.phases import PhaseClock
from prune_lightning.tasks.presets import load_model, settled
from prune_lightning.tasks.tune_trial import Pilots


def arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description="Statistics of a text against the model's own text.")
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--text", required=True, help="text file to compare with")
    parser.add_argument("--data", required=True, help="CounterFact file")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--methods", default="rome,memit,alphaedit")
    parser.add_argument("--tokens", default="5,10,20,50", help="tokens, in multiples of the width of the keys")
    parser.add_argument("--cache", default="~/.cache/prune-lightning/statistics")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides, such as method.value.steps=20")
    return parser.parse_args()


def configuration(args: argparse.Namespace, method: str, corpus: str) -> DictConfig:
    """Return the settled configuration of one method with one corpus."""
    words = [
        *("model=auto", f"model.path={args.model}", f"method={method}", "restraint=none", "data=counterfact"),
        *(
            f"data.path={args.data}",
            f"data.num_edits={args.edits}",
            f"model.second_moments.cache='{Path(args.cache).expanduser()}'",
        ),
        "model.second_moments.corpus=self" if corpus == "own" else f"model.second_moments.corpus.path={args.text}",
        "++method.tokens_per_feature=null",
        *args.set,
    ]
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return settled(hydra.compose("train", overrides=words))


def main() -> None:
    """Print the table."""
    args, out = arguments(), Console()
    out.print("| method | text | tokens / key | efficacy | paraphrase | locality | drift, KL |")
    out.print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for method in args.methods.split(","):
        for corpus in ("file", "own"):
            config = configuration(args, method, corpus)
            model = load_model(config)
            stream = instantiate(config.data)
            stream.fit(model.tokens)
            pilots = Pilots(config, model, stream.requests, rungs=1, clock=PhaseClock())
            width = model.key_size(config.method.layers[0])
            for factor in map(float, args.tokens.split(",")):
                size = {"max_tokens": round(factor * width), "sampled.tokens_per_key": factor}
                values = {f"model.second_moments.{name}": value for name, value in size.items()}
                found = pilots.run(values, range(len(stream.requests))).terms
                figures = [f"{found.get(term, math.nan):.3f}" for term in ("efficacy", "paraphrase", "locality")]
                kl = -math.log(found["drift"]) if found.get("drift") else math.inf
                out.print(f"| {method} | {corpus} | {factor:g} | {' | '.join(figures)} | {kl:.3f} |")


if __name__ == "__main__":
    main()
