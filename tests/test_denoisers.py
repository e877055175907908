"What each family's denoiser is asked in training is what its pipeline asks in its own loop."

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from families import call_settings, emotion_words
from tiny_pipelines import BUILDERS, build

from uniemo.diffusion.denoisers import Noise, denoiser_of

torch.set_num_threads(1)
PROMPTS = ["a photo of a castle", "red dog"]


@pytest.fixture(scope="module", params=list(BUILDERS))
def pipe(request):
    return build(request.param)


def own_loop(pipe, monkeypatch):
    "What the pipeline's scheduler is given in one step: answer, timestep, latents."
    seen = []
    step = type(pipe.scheduler).step

    def look(self, model_output, timestep, sample, *args, **kwargs):
        seen.append((model_output.clone(), timestep, sample.clone()))
        return step(self, model_output, timestep, sample, *args, **kwargs)

    monkeypatch.setattr(type(pipe.scheduler), "step", look)
    # nothing guides; what a model is told of guidance is not tried here
    settings = call_settings(pipe, guidance_scale=0.0 if hasattr(pipe, "transformer") else 1.0)
    settings.pop("max_sequence_length", None)
    settings.pop("complex_human_instruction", None)
    settings["num_inference_steps"] = 1
    # a list of its own: Z-Image's pipeline writes into it
    pipe(
        list(PROMPTS), generator=torch.Generator().manual_seed(0), output_type="latent", **settings
    )
    return seen[0]


def test_one_step_of_the_own_loop(pipe, monkeypatch):
    answer, timestep, latents = own_loop(pipe, monkeypatch)
    denoiser = denoiser_of(pipe)
    packed = latents.ndim == 3
    if packed:
        latents = pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor)
        answer = pipe._unpack_latents(answer, 32, 32, pipe.vae_scale_factor)
    scaled = latents
    if type(pipe.scheduler).__name__ == "EulerDiscreteScheduler":
        pipe.scheduler.set_timesteps(1)
        scaled = pipe.scheduler.scale_model_input(latents, timestep)
    with torch.no_grad():
        condition = denoiser.encode(PROMPTS, "cpu")
        found = denoiser.predict(scaled, timestep.expand(2), condition)
    torch.testing.assert_close(found, answer, atol=1e-5, rtol=1e-4)


def test_noise_is_that_of_the_pipelines_scheduler(pipe):
    "At a middle place, by the formula of its kind."
    noise = Noise(pipe.scheduler)
    torch.manual_seed(0)
    latents, drawn = torch.randn(2, 2, 4, 8, 8)
    times = noise.timesteps(torch.tensor([100, 700]))
    noised = noise.add(latents, drawn, times)
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        share = (times / 1000).view(2, 1, 1, 1)
        wanted = (1 - share) * latents + share * drawn
        target = drawn - latents
    else:
        kept = pipe.scheduler.alphas_cumprod[times].view(2, 1, 1, 1)
        wanted = kept.sqrt() * latents + (1 - kept).sqrt() * drawn
        target = drawn
    torch.testing.assert_close(noised, wanted, atol=1e-6, rtol=1e-5)
    found = noise.target(latents, drawn, times)
    torch.testing.assert_close(found, target)


def test_velocity():
    noise = Noise(DDIMScheduler(prediction_type="v_prediction"))
    torch.manual_seed(0)
    latents, drawn = torch.randn(2, 2, 4, 8, 8)
    times = torch.tensor([100, 700])
    kept = noise.scheduler.alphas_cumprod[times].view(2, 1, 1, 1)
    wanted = kept.sqrt() * drawn - (1 - kept).sqrt() * latents
    found = noise.target(latents, drawn, times)
    torch.testing.assert_close(found, wanted)


def test_a_word_changes_what_the_denoiser_says(pipe):
    words = emotion_words(pipe).attach(pipe)
    denoiser = denoiser_of(pipe)
    answers = []
    torch.manual_seed(0)
    model = denoiser.model.config
    channels = 1 if "Flux" in type(pipe).__name__ else model.in_channels
    noised = torch.randn(1, channels, 8, 8)
    for emotion in ("awe", "fear"):
        with torch.no_grad(), words(emotion):
            condition = denoiser.encode(["<emotion> castle"], "cpu")
            answers.append(denoiser.predict(noised, torch.tensor([500.0]), condition))
    assert (answers[0] - answers[1]).abs().max() > 0
