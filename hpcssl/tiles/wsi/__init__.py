"""Reading whole slides: compressed blocks straight from TIFF files, local or remote; OpenSlide for everything else."""
