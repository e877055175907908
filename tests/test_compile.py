"Compiled blocks train to the same losses, and a checkpoint fits with and without them."

import shutil

import numpy as np
import pytest
import torch
from torch import nn

from uniemo.diffusion.painting import regions
from uniemo.pipeline import UniEmoPipeline
from uniemo.train import Stage, TrainConfig, Trainer

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")


class Line(Stage):
    "Two blocks alike."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def repeated_blocks(self):
        return list(self.blocks)

    def parameter_groups(self):
        return dict(line=(dict(self.named_parameters()), 1e-2, 0.0))

    def loss(self, batch, counts=None):
        return dict(loss=self.blocks(batch["x"]).square().mean())


def losses(folder, *stops, compiled):
    "Logged losses of a run that stops and goes on, compiled or not at each start."
    data = dict(x=torch.randn(16, 4, generator=torch.Generator().manual_seed(1)))
    for stop, compiled_now in zip((*stops, None), compiled):
        config = TrainConfig(
            steps=6, batch_size=4, log_every=1, save_every=3, cpu=True, compile=compiled_now
        )
        trainer = Trainer(Line(), config, data, folder=folder, progress=False).fit(until=stop)
    return torch.tensor([row["loss"] for row in trainer.history if row["split"] == "train"])


def test_compiled_blocks_train_alike(tmp_path):
    plain = losses(tmp_path / "plain", compiled=[False])
    mixed = losses(tmp_path / "mixed", 3, compiled=[True, False])
    torch.testing.assert_close(mixed, plain, atol=1e-5, rtol=0)


def test_compiled_pipeline_paints_alike():
    plain = UniEmoPipeline.from_pretrained("mini")
    compiled = UniEmoPipeline.from_pretrained("mini").compile(backend="eager")
    parts = [*regions(compiled.unet), compiled.vae.decoder]
    assert parts and all(part._compiled_call_impl for part in parts)
    shown = []
    for pipe in (plain, compiled):
        pipe.set_progress_bar_config(disable=True)
        made = pipe.generate("awe", 2, num_inference_steps=3, judge=False)
        shown.append(np.stack([np.asarray(image) for image in made.images]).astype(int))
    # another layout sums in another order: a byte may round the other way
    assert np.abs(shown[0] - shown[1]).max() <= 2
