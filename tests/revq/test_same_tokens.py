"""Equal latents give equal tokens: every implementation and thread count, on real latents of the embedded VAE."""

import torch

from revq import assets
from revq.data.images import center_crop, load_image, to_tensor
from revq.data.vae import load_vae
from revq_kernels import FastChannelVQ, nearest_code


def test_reference_and_native_agree_on_real_latents():
    photos = assets.held_out_photos()[:16]
    latents = load_vae("embedded").encode(to_tensor([center_crop(load_image(path), 128) for path in photos]))
    quantizer = FastChannelVQ(16, 4, num_groups=512)
    quantizer.initialize_(latents)  # codes are latent vectors, so distances of zero occur
    codebook = torch.cat([quantizer.codebook, quantizer.codebook], dim=1)
    x = latents.reshape(16, 512, 4)
    expected = nearest_code(x, codebook, impl="reference")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(nearest_code(x, codebook, impl="native"), expected)
            assert torch.equal(nearest_code(x, codebook, impl="reference"), expected)
    finally:
        torch.set_num_threads(before)
    assert int(expected.max()) < 16, "of two duplicate codes the lower index is chosen"
