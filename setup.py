"""Package metadata of hpcssl; beside each dependency stands why it is there."""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRED = [
    "torch>=2.5",  # training, DDP, MIL heads
    "torchvision>=0.20",  # timm needs it; its colour semantics are our reference
    "timm>=1.0.9",  # encoders, under the names that the field uses
    "numpy>=1.26",  # plans, schedules, stores
    "numba>=0.60",  # the hot loops of the schedule
    "pillow>=10",  # JPEG decoding and the reference augmentations
    "simplejpeg>=1.7",  # JPEG decoding by libjpeg-turbo
    "tifffile>=2024.8",  # where the compressed blocks of a whole slide lie
    "imagecodecs>=2024.6",  # decoding them
    "openslide-python>=1.3",  # whole slides of other formats
    "openslide-bin>=4",  # its library
    "scipy>=1.11",  # tissue masks, t-tests
    "submitit>=1.5.2,<1.6",  # launching on SLURM and on this machine
    "pydantic>=2.7",  # types of every configuration, checked with one clear message
    "typing-extensions>=4.6",  # lets a type checker see what `settings` makes of a class
    "packaging>=22",  # doctor reads the versions above from the package's metadata
    "pyyaml>=6",  # recipes, specs and profiles are YAML
    "pandas>=2.1",  # slide tables and result tables
    "pyarrow>=15",  # Parquet
    "h5py>=3.10",  # feature files in the layout of CLAM and TRIDENT
    "safetensors>=0.4.3",  # checkpoints that load without unpickling code
    "matplotlib>=3.8",  # figures
    "jinja2>=3.1",  # report.html
    "tensorboard>=2.16",  # curves while a run goes on
    "rich>=13.7",  # progress bars and terminal tables
]

EXTRAS = {
    # decoding and augmentation on the GPU, or on the CPU; take the one of your CUDA driver
    "dali": ["nvidia-dali-cuda130>=1.50"],
    "dali-cuda12": ["nvidia-dali-cuda120>=1.40"],  # V100 nodes: the last builds that hold Volta code
    # pillow-simd replaces pillow's module PIL: pip uninstall -y pillow && pip install '.[simd]'
    # (it is compiled: needs a C compiler and the headers of libjpeg and zlib)
    "simd": ["pillow-simd>=9.5"],
    "numpy1": ["numpy>=1.26,<2", "pyarrow<22"],  # for a stack that is tied to numpy 1.26; later pyarrow needs numpy 2
    "remote": ["aiohttp>=3.9", "fsspec>=2024.5", "s3fs>=2024.5"],  # whole slides over HTTP and from S3
    "dev": [
        "nvidia-dali-cuda130>=1.50",  # its graph is tested on the CPU
        "aiohttp>=3.9",
        "fsspec>=2024.5",
        "s3fs>=2024.5",
        "moto[server]>=5",  # an S3 server for the tests
        "scikit-learn>=1.4",  # metrics and neighbours are tested against it
        "tiffslide>=2.4",  # tools/bench_tiling.py stands beside it
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",  # tests in several processes
        "hypothesis>=6.100",
        "ruff>=0.6",
        "mypy>=1.11",
        "pandas-stubs",
        "types-PyYAML",
    ],
}

# Specs and profiles live at the top level, where people look for them, and are installed as data packages.
DATA_PACKAGES = {"hpcssl.data.schedules": "schedules", "hpcssl.data.profiles": "launch/profiles"}

setup(
    name="hpcssl",
    version="0.1.0",
    description="Pretraining of pathology foundation models on SLURM clusters, exact from tiles to benchmark",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["hpcssl", "hpcssl.*"]), *DATA_PACKAGES],
    package_dir={"": ".", **DATA_PACKAGES},
    package_data={
        "hpcssl.data.schedules": ["*.yaml", "README.md"],
        "hpcssl.data.profiles": ["*.yaml"],
        "hpcssl.train": ["recipes/*.yaml"],
        "hpcssl.report": ["*.html.j2"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["hpcssl=hpcssl.cli.main:main"]},
)
