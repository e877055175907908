"""JupyterLab in this checkout: a notebook opens unchanged, and is saved as `nbdev_clean` leaves it.

JupyterLab writes the kernel's name and its Python's version into each notebook that it opens, marks
it as changed, and saves it two minutes later. Committed notebooks carry neither, so that they are
the same whoever ran them. `make` puts this file into .venv/etc/jupyter, where JupyterLab reads it.
"""

from functools import cache

from jupyter_server.services.contents.largefilemanager import AsyncLargeFileManager


@cache
def of_the_kernel():
    "What JupyterLab would write into a notebook that a kernel of this environment runs."
    from ipykernel.ipkernel import IPythonKernel
    from jupyter_client.kernelspec import KernelSpecManager

    spec = KernelSpecManager().get_kernel_spec("python3")
    named = dict(name="python3", display_name=spec.display_name, language=spec.language)
    return dict(kernelspec=named, language_info=IPythonKernel.language_info)


def is_cleaned(notebook):
    "Whether a notebook lies as `nbdev_clean` leaves it: those of runs and of your own do not."
    metadata = notebook["metadata"]
    named = metadata.get("kernelspec", {}).get("name") == "python3"
    return named and "language_info" not in metadata


class CleanNotebooks(AsyncLargeFileManager):
    "Shows a committed notebook with what JupyterLab would add at once; saves it without."

    async def get(self, path, content=True, *args, **keywords):
        model = await super().get(path, content, *args, **keywords)
        if content and model["type"] == "notebook" and is_cleaned(model["content"]):
            model["content"]["metadata"].update(of_the_kernel())
        return model

    async def save(self, model, path=""):
        if model["type"] == "notebook" and model.get("content") and await self.file_exists(path):
            before = await super().get(path)
            if before["type"] == "notebook" and is_cleaned(before["content"]):
                from nbdev.clean import clean_nb

                clean_nb(model["content"], allowed_cell_metadata_keys=["tags"])
        return await super().save(model, path)


c = get_config()  # noqa: F821
c.ServerApp.contents_manager_class = CleanNotebooks
