"""Word attention: DAMSM and AttnGAN."""
