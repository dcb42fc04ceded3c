"""First stage: the VQGAN that turns images into codes and back, its losses, its discriminator and its artefact on disk."""
