"Tiny random pipelines of every family that words can be put into; nothing is downloaded."

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

WORDS = ["a", "photo", "of", "castle", "dog", "in", "the", "sea", "on", "beach", "red", "blue"]
# tokens before and after the words, what stands around a prompt, the special ones by their names
TOKENIZERS = {
    "clip": (
        ["!", "[UNK]"],
        ["<|startoftext|>", "<|endoftext|>"],
        "<|startoftext|> $A <|endoftext|>",
        dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="!"),
    ),
    "t5": (["<pad>", "[UNK]"], ["</s>"], "$A </s>", dict(eos_token="</s>", pad_token="<pad>")),
    "gemma": (
        ["<pad>", "[UNK]", "<bos>"],
        ["<eos>"],
        "<bos> $A",
        dict(bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"),
    ),
    "qwen": (
        ["<pad>", "[UNK]", "<|im_start|>", "<|im_end|>", "user", "assistant"],
        [],
        None,
        dict(eos_token="<|im_end|>", pad_token="<pad>"),
    ),
}
CHAT = (
    "{% for m in messages %}<|im_start|> {{m.role}} {{m.content}} <|im_end|> {% endfor %}"
    "<|im_start|> assistant"
)


def tokenizer(kind):
    "A tokenizer of whole words, with the special tokens of a `kind`."
    before, after, template, special = TOKENIZERS[kind]
    vocab = {word: i for i, word in enumerate([*before, *WORDS, *after])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        marks = [(token, vocab[token]) for token in template.split() if token != "$A"]
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=marks
        )
    length = 77 if kind in ("clip", "t5") else 300
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", model_max_length=length, **special
    )
    if kind == "qwen":
        made.chat_template = CHAT
    return made


def clip(tokenizer, projected=True, hub_end=False, width=32):
    "`hub_end`: the end token is 2, as in the published configs, so that the largest id is pooled."
    torch.manual_seed(width)
    config = CLIPTextConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=2 if hub_end else tokenizer.eos_token_id,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=5,
        pad_token_id=0,
        vocab_size=len(tokenizer),
        projection_dim=32,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(tokenizer):
    torch.manual_seed(1)
    sizes = dict(d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval()


def autoencoder(channels=4, **settings):
    torch.manual_seed(2)
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **settings,
    ).eval()


def unet(**settings):
    torch.manual_seed(3)
    return UNet2DConditionModel(
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **settings,
    ).eval()


SHIFTED = dict(shift_factor=0.06, scaling_factor=1.5)
SMALL_UNET = dict(
    block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=32, norm_num_groups=2
)


def stable_diffusion(hub_end=False):
    tok = tokenizer("clip")
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        autoencoder(),
        clip(tok, False, hub_end),
        tok,
        unet(**SMALL_UNET),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(hub_end=False):
    first, second = tokenizer("clip"), tokenizer("clip")
    model = unet(
        block_out_channels=(2, 4),
        layers_per_block=2,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=80,
        norm_num_groups=1,
    )
    encoders = clip(first, False, hub_end), clip(second, True, hub_end, 48)
    return StableDiffusionXLPipeline(
        autoencoder(), *encoders, first, second, model, EulerDiscreteScheduler()
    )


def stable_diffusion_3(hub_end=False):
    first, second, third = tokenizer("clip"), tokenizer("clip"), tokenizer("t5")
    torch.manual_seed(3)
    model = SD3Transformer2DModel(
        sample_size=32,
        patch_size=1,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=16,
    ).eval()
    return StableDiffusion3Pipeline(
        model,
        FlowMatchEulerDiscreteScheduler(),
        autoencoder(16, **SHIFTED),
        clip(first, True, hub_end, 16),
        first,
        clip(second, True, hub_end, 16),
        second,
        t5(third),
        third,
    )


def flux(hub_end=False):
    first, second = tokenizer("clip"), tokenizer("t5")
    torch.manual_seed(3)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler()
    encoders = clip(first, False, hub_end), first, t5(second), second
    return FluxPipeline(scheduler, autoencoder(1, **SHIFTED), *encoders, model)


def pixart_sigma(hub_end=False):
    tok = tokenizer("t5")
    torch.manual_seed(3)
    model = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    ).eval()
    return PixArtSigmaPipeline(tok, t5(tok), autoencoder(), model, DDIMScheduler())


def sana(hub_end=False):
    tok = tokenizer("gemma")
    torch.manual_seed(3)
    model = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    ).eval()
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    ).eval()
    encoder = Gemma2Model(
        Gemma2Config(
            head_dim=16,
            hidden_size=8,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=1,
            num_key_value_heads=2,
            vocab_size=len(tok),
            attn_implementation="eager",
        )
    ).eval()
    return SanaPipeline(tok, encoder, vae, model, FlowMatchEulerDiscreteScheduler(shift=7.0))


def z_image(hub_end=False):
    tok = tokenizer("qwen")
    torch.manual_seed(3)
    model = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    ).eval()
    with torch.no_grad():
        # made empty, and so perhaps not finite
        model.x_pad_token.fill_(1.0)
        model.cap_pad_token.fill_(1.0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[32, 64],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=32,
        sample_size=32,
        scaling_factor=0.36,
        shift_factor=0.11,
    ).eval()
    encoder = Qwen3Model(
        Qwen3Config(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=len(tok),
            max_position_embeddings=512,
        )
    ).eval()
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, encoder, tok, model)


BUILDERS = {
    "Stable Diffusion 1.x and 2.x": stable_diffusion,
    "Stable Diffusion XL": stable_diffusion_xl,
    "Stable Diffusion 3": stable_diffusion_3,
    "FLUX.1": flux,
    "PixArt-Sigma": pixart_sigma,
    "Sana": sana,
    "Z-Image": z_image,
}


def build(family, hub_end=False):
    "A tiny pipeline of a family, quiet and frozen."
    pipe = BUILDERS[family](hub_end)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipe
