"""Files outside of docs/ that pages show: the plots of the front page, which is README.md."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the plots under the paths by which README.md links them."""
    root = Path(config.config_file_path).parent
    for path in sorted(root.glob("benchmarks/results/*.png")):
        files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files
