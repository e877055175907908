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


class CleanNotebooks(AsyncLargeFileManager):
    "Shows a notebook with what JupyterLab would add at once; saves it without."

    async def get(self, path, content=True, *args, **keywords):
        model = await super().get(path, content, *args, **keywords)
        if content and model["type"] == "notebook":
            metadata = model["content"]["metadata"]
            if metadata.get("kernelspec", {}).get("name") == "python3":
                metadata.update(of_the_kernel())
        return model

    async def save(self, model, path=""):
        if model["type"] == "notebook" and model.get("content"):
            from nbdev.clean import clean_nb

            clean_nb(model["content"], allowed_cell_metadata_keys=["tags"])
        return await super().save(model, path)


c = get_config()  # noqa: F821
c.ServerApp.contents_manager_class = CleanNotebooks
