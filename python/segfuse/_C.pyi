__file__: str
cuda_architectures: str
cuda_version: str
torch_version: str
torch_target: str
sanitize: str

def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
