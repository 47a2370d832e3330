//! Safetensors files: read a tensor at a time, atomic for writing, every refusal naming its tensor.

use crate::Error;
use burn::tensor::{DType, Device, Element, Tensor, TensorData, bf16, f16};
use bytemuck::Pod;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// One safetensors file or the shards of one model. Reading takes a tensor out, so that what is left over
/// can be told, and holds no other: loading peaks at little more than what it makes.
#[derive(Debug)]
pub struct TensorFile {
    shards: Vec<(PathBuf, File)>,
    entries: BTreeMap<String, Entry>,
}

/// What the header says of the file's tensors, checked against its size. Only the header's pages are touched.
fn entries(path: &Path, file: &File, shard: usize) -> Result<Vec<(String, Entry)>, Error> {
    let size = file.metadata().map_err(|e| Error::io(path, e))?.len();
    if size == 0 {
        return Err(Error::format(path, "is empty; expected a safetensors file"));
    }
    // SAFETY: the map is private to this process, only read, and gone when this function returns. Another
    // process that truncates the file meanwhile would crash this one; model files are not edited in
    // place, and writes of ours replace files whole.
    #[allow(unsafe_code)]
    let map = unsafe { Mmap::map(file) }.map_err(|e| Error::io(path, e))?;
    let view = SafeTensors::deserialize(&map).map_err(|e: SafeTensorError| {
        let reason = format!("is not a whole safetensors file ({e}); copy or download it again");
        Error::format(path, reason)
    })?;
    let base = map.as_ptr() as usize;
    let entry = |(name, tensor): (&str, TensorView<'_>)| {
        let start = tensor.data().as_ptr() as usize - base;
        let range = start..start + tensor.data().len();
        let (dtype, shape) = (tensor.dtype(), tensor.shape().to_vec());
        (name.to_owned(), Entry { shard, dtype, shape, range })
    };
    Ok(view.iter().map(entry).collect())
}

impl TensorFile {
    /// Opens one file.
    ///
    /// # Errors
    /// A missing, empty or truncated file, or a header that lies about it.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        Self::open_shards([path.into()])
    }

    /// Opens the shards of one model.
    ///
    /// # Errors
    /// As [`TensorFile::open`]; or a tensor that stands in two shards.
    pub fn open_shards(paths: impl IntoIterator<Item = PathBuf>) -> Result<Self, Error> {
        let mut file = Self { shards: Vec::new(), entries: BTreeMap::new() };
        for path in paths {
            let opened = File::open(&path).map_err(|e| Error::io(&path, e))?;
            for (name, entry) in entries(&path, &opened, file.shards.len())? {
                if file.entries.contains_key(&name) {
                    let twice = format!("tensor `{name}` stands in an earlier shard too");
                    return Err(Error::format(&path, twice));
                }
                file.entries.insert(name, entry);
            }
            file.shards.push((path, opened));
        }
        Ok(file)
    }

    /// Names of the tensors that were not taken yet, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether a tensor of that name is there and was not taken yet.
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Sizes of a tensor's axes.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Type of a tensor's numbers, as safetensors names it.
    pub fn dtype(&self, name: &str) -> Option<String> {
        self.entries.get(name).map(|entry| format!("{:?}", entry.dtype))
    }

    /// Bytes that all tensors not taken yet occupy.
    pub fn bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.range.len()).sum()
    }

    /// Leaves a tensor out, as if it had been taken.
    pub fn skip(&mut self, name: &str) {
        self.entries.remove(name);
    }

    /// Gives each tensor that was not taken yet another name; of two that get one name the last stays.
    pub fn rename(&mut self, mut name: impl FnMut(&str) -> String) {
        let entries = std::mem::take(&mut self.entries);
        self.entries = entries.into_iter().map(|(old, entry)| (name(&old), entry)).collect();
    }

    /// The numbers of a tensor, where they will stay: bytes that are not laid out for them would be copied.
    fn read<E: Pod>(&self, entry: &Entry) -> Result<Vec<E>, Error> {
        let (path, mut file) = (&self.shards[entry.shard].0, &self.shards[entry.shard].1);
        let mut numbers = vec![E::zeroed(); entry.range.len() / size_of::<E>()];
        let read = file.seek(SeekFrom::Start(entry.range.start as u64));
        let read = read.and_then(|_| file.read_exact(bytemuck::cast_slice_mut(&mut numbers)));
        read.map_err(|e| Error::io(path, e))?;
        Ok(numbers)
    }

    fn data<E: Pod + Element>(&self, entry: Entry) -> Result<TensorData, Error> {
        let numbers = self.read::<E>(&entry)?;
        Ok(TensorData::new(numbers, entry.shape))
    }

    /// Takes a float tensor out, in the type that the file has.
    ///
    /// # Errors
    /// A missing tensor or one that does not hold floats; a file that cannot be read any more.
    pub fn take_data(&mut self, name: &str) -> Result<TensorData, Error> {
        let Some(entry) = self.entries.remove(name) else {
            let near = Error::no_match("file", name, "tensor", self.names());
            return Err(Error::tensor(
                name,
                "this tensor",
                format!("no tensor of that name ({near})"),
            ));
        };
        match entry.dtype {
            Dtype::F32 => self.data::<f32>(entry),
            Dtype::F16 => self.data::<f16>(entry),
            Dtype::BF16 => self.data::<bf16>(entry),
            Dtype::F64 => self.data::<f64>(entry),
            other => Err(Error::tensor(
                name,
                "numbers of type F32, F16, BF16 or F64",
                format!("type {other:?}"),
            )),
        }
    }

    /// Takes an integer tensor (I64, I32, I16 or U8) out.
    ///
    /// # Errors
    /// A missing tensor or one of another type.
    pub fn take_ints(&mut self, name: &str) -> Result<(Vec<usize>, Vec<i64>), Error> {
        let Some(entry) = self.entries.remove(name) else {
            let held = self.names().collect::<Vec<_>>().join(", ");
            return Err(Error::tensor(name, "this tensor", format!("only: {held}")));
        };
        let bytes: Vec<u8> = self.read(&entry)?;
        let ints = match entry.dtype {
            Dtype::I64 => bytes
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(std::array::from_fn(|i| b[i])))
                .collect(),
            Dtype::I32 => bytes
                .chunks_exact(4)
                .map(|b| i64::from(i32::from_le_bytes(std::array::from_fn(|i| b[i]))))
                .collect(),
            Dtype::I16 => bytes
                .chunks_exact(2)
                .map(|b| i64::from(i16::from_le_bytes(std::array::from_fn(|i| b[i]))))
                .collect(),
            Dtype::U8 => bytes.iter().map(|&b| i64::from(b)).collect(),
            other => {
                return Err(Error::tensor(name, "integers of type I64", format!("type {other:?}")));
            }
        };
        Ok((entry.shape, ints))
    }

    /// Takes a float tensor out as f32 on `device`, checking its shape.
    ///
    /// # Errors
    /// A missing tensor, another shape, or a type that is no float.
    pub fn take<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
        device: &Device,
    ) -> Result<Tensor<D>, Error> {
        if let Some(found) = self.shape(name)
            && found != shape
        {
            return Err(Error::tensor(
                name,
                format!("shape {shape:?}"),
                format!("shape {found:?}"),
            ));
        }
        let data = self.take_data(name)?.convert::<f32>();
        Ok(Tensor::from_data(data, device))
    }
}

/// The tensors of one place, by their names after its path.
#[derive(Debug)]
pub struct PlaceTensors<'f> {
    file: &'f mut TensorFile,
    prefix: String,
}

impl<'f> PlaceTensors<'f> {
    /// Those whose names begin with `prefix` and a dot; all, if it is empty.
    pub fn new(file: &'f mut TensorFile, prefix: impl Into<String>) -> Self {
        Self { file, prefix: prefix.into() }
    }

    fn name(&self, suffix: &str) -> String {
        match self.prefix.as_str() {
            "" => suffix.to_owned(),
            prefix => format!("{prefix}.{suffix}"),
        }
    }

    /// Whether the place has a tensor of that name.
    pub fn has(&self, suffix: &str) -> bool {
        self.file.has(&self.name(suffix))
    }

    /// Takes one out as f32; see [`TensorFile::take`].
    ///
    /// # Errors
    /// As [`TensorFile::take`].
    pub fn take<const D: usize>(
        &mut self,
        suffix: &str,
        shape: [usize; D],
        device: &Device,
    ) -> Result<Tensor<D>, Error> {
        let name = self.name(suffix);
        self.file.take(&name, shape, device)
    }

    /// Takes integers out; see [`TensorFile::take_ints`].
    ///
    /// # Errors
    /// As [`TensorFile::take_ints`].
    pub fn take_ints(&mut self, suffix: &str) -> Result<(Vec<usize>, Vec<i64>), Error> {
        let name = self.name(suffix);
        self.file.take_ints(&name)
    }
}

fn dtype_of(data: &TensorData) -> Option<Dtype> {
    Some(match data.dtype() {
        DType::F64 => Dtype::F64,
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::U8 => Dtype::U8,
        _ => return None,
    })
}

/// Writes tensors as a safetensors file, whole or not at all.
///
/// # Errors
/// As [`tensor_bytes`]; or a disk that is full or read-only.
pub fn write_tensors<'t>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, &'t TensorData)>,
) -> Result<(), Error> {
    write_atomic(path, &tensor_bytes(path, tensors)?)
}

/// Tensors as a safetensors file, with the metadata `{"format": "pt"}` that PyTorch's readers ask for.
///
/// # Errors
/// A type that the format cannot hold; `path` is where the file will lie.
pub fn tensor_bytes<'t>(
    path: &Path,
    tensors: impl IntoIterator<Item = (String, &'t TensorData)>,
) -> Result<Vec<u8>, Error> {
    let mut views: BTreeMap<String, TensorView<'_>> = BTreeMap::new();
    for (name, data) in tensors {
        let Some(dtype) = dtype_of(data) else {
            let found = format!("type {:?}", data.dtype());
            return Err(Error::tensor(name, "floats or integers", found));
        };
        let shape = data.shape().to_vec();
        let view = TensorView::new(dtype, shape, data.as_bytes())
            .map_err(|e| Error::format(path, format!("cannot hold `{name}`: {e}")))?;
        views.insert(name, view);
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata))
        .map_err(|e| Error::format(path, format!("cannot be written: {e}")))
}

/// Writes a file whole or not at all: a temporary file beside it, synced, then renamed over it. What is
/// no regular file (a pipe, `/dev/null`) is written to as it is.
///
/// # Errors
/// What the operating system says; the old file, if there was one, is untouched then.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    write_together(&[(path.to_owned(), bytes)])
}

/// Writes several files of one folder, all or none as far as a file system can: each is staged beside
/// its place and synced, so that a full disk leaves the old ones, and then they get their names in
/// order. The last one is the mark of a complete folder; an old one goes before any other changes.
///
/// # Errors
/// What the operating system says.
pub fn write_together(files: &[(PathBuf, &[u8])]) -> Result<(), Error> {
    let mut staged = Vec::with_capacity(files.len());
    for (path, bytes) in files {
        // A link stays one: what it points to is replaced.
        let path = path.canonicalize().unwrap_or_else(|_| path.clone());
        match path.metadata() {
            Ok(there) if !there.is_file() => {
                std::fs::write(&path, bytes).map_err(|e| Error::io(&path, e))?;
            }
            _ => staged.push((stage(&path, bytes)?, path)),
        }
    }
    if let [_, .., (_, mark)] = staged.as_slice()
        && mark.is_file()
    {
        std::fs::remove_file(mark).map_err(|e| Error::io(mark, e))?;
    }
    for (file, path) in staged {
        file.persist(&path).map_err(|e| Error::io(&path, e.error))?;
    }
    Ok(())
}

fn stage(path: &Path, bytes: &[u8]) -> Result<tempfile::NamedTempFile, Error> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let mut file = tempfile::NamedTempFile::new_in(folder).map_err(|e| Error::io(folder, e))?;
    file.write_all(bytes).map_err(|e| Error::io(path, e))?;
    file.as_file().sync_all().map_err(|e| Error::io(path, e))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        // Temporary files are private; an adapter is as readable as any file its owner makes.
        let mode = std::fs::Permissions::from_mode(0o644);
        file.as_file().set_permissions(mode).map_err(|e| Error::io(path, e))?;
    }
    Ok(file)
}
