//! Weights out of an ONNX file, by the names of the layers that they belong to.
//!
//! The format is protobuf, of which only what is named here is read: a model has a graph (field 7), a graph
//! nodes (1) and constants (5), a node inputs (1) and a name (3), a constant sizes (1), a type (2, where 1 is
//! f32), a name (8) and bytes (9).

use std::collections::BTreeMap;

/// A constant in f32.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Constant {
    pub(crate) shape: Vec<usize>,
    /// Little-endian.
    pub(crate) bytes: Vec<u8>,
}

impl Constant {
    /// A matrix the other way round: what multiplies from the right is stored `[in, out]`, and a linear layer's
    /// weight `[out, in]`.
    pub(crate) fn transposed(&self) -> Result<Self, String> {
        let [rows, columns] = self.shape[..] else {
            return Err(format!("expected a matrix, found shape {:?}", self.shape));
        };
        let mut bytes = Vec::with_capacity(self.bytes.len());
        for column in 0..columns {
            for row in 0..rows {
                let at = 4 * (row * columns + column);
                bytes.extend_from_slice(&self.bytes[at..at + 4]);
            }
        }
        Ok(Self { shape: vec![columns, rows], bytes })
    }
}

/// The constants of a graph, and which node reads which.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    /// By their names.
    pub(crate) constants: BTreeMap<String, Constant>,
    /// Names of nodes, each with those of all its inputs.
    pub(crate) nodes: Vec<(String, Vec<String>)>,
}

impl Graph {
    /// The graph of a file.
    pub(crate) fn read(file: &[u8]) -> Result<Self, String> {
        let mut graph = Self::default();
        for field in fields(file) {
            if let (7, Value::Bytes(bytes)) = field? {
                graph.add(bytes)?;
            }
        }
        match graph.constants.is_empty() {
            false => Ok(graph),
            true => Err("holds no constants in f32; expected an ONNX model".into()),
        }
    }

    fn add(&mut self, graph: &[u8]) -> Result<(), String> {
        for field in fields(graph) {
            match field? {
                (1, Value::Bytes(node)) => {
                    let (mut name, mut inputs) = (String::new(), Vec::new());
                    for field in fields(node) {
                        match field? {
                            (1, Value::Bytes(input)) => inputs.push(text(input)),
                            (3, Value::Bytes(own)) => name = text(own),
                            _ => {}
                        }
                    }
                    self.nodes.push((name, inputs));
                }
                (5, Value::Bytes(tensor)) => {
                    let (mut name, mut shape, mut kind, mut bytes) =
                        (String::new(), Vec::new(), 0, Vec::new());
                    for field in fields(tensor) {
                        match field? {
                            (1, Value::Number(size)) => shape.push(size as usize),
                            (1, Value::Bytes(packed)) => shape.extend(numbers(packed)?),
                            (2, Value::Number(number)) => kind = number,
                            (8, Value::Bytes(own)) => name = text(own),
                            (9, Value::Bytes(raw)) => bytes = raw.to_vec(),
                            _ => {}
                        }
                    }
                    let count = shape.iter().try_fold(4_usize, |n, size| n.checked_mul(*size));
                    if kind == 1 && count == Some(bytes.len()) {
                        self.constants.insert(name, Constant { shape, bytes });
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The constant that the node of this name reads.
    pub(crate) fn read_by(&self, node: &str) -> Result<&Constant, String> {
        let inputs = self.nodes.iter().find(|(name, _)| name == node).map(|(_, inputs)| inputs);
        let inputs = inputs.ok_or_else(|| format!("has no node {node}"))?;
        let constant = inputs.iter().find_map(|input| self.constants.get(input));
        constant.ok_or_else(|| format!("{node} reads no constant in f32"))
    }
}

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

const BROKEN: &str = "is not a whole ONNX file";

fn number(bytes: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or(BROKEN)?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if *byte < 0x80 {
            return Ok(value);
        }
    }
    Err(BROKEN.into())
}

fn numbers(mut bytes: &[u8]) -> Result<Vec<usize>, String> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        found.push(number(&mut bytes)? as usize);
    }
    Ok(found)
}

/// The fields of a message, each with its number; the last is an error where the message is broken.
struct Fields<'a>(&'a [u8]);

fn fields(bytes: &[u8]) -> Fields<'_> {
    Fields(bytes)
}

impl<'a> Fields<'a> {
    fn field(&mut self) -> Result<(u64, Value<'a>), String> {
        let key = number(&mut self.0)?;
        let length = match key & 7 {
            0 => return Ok((key >> 3, Value::Number(number(&mut self.0)?))),
            1 => 8,
            2 => number(&mut self.0)? as usize,
            5 => 4,
            _ => return Err(BROKEN.into()),
        };
        let (own, rest) = self.0.split_at_checked(length).ok_or(BROKEN)?;
        self.0 = rest;
        Ok((key >> 3, Value::Bytes(own)))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<(u64, Value<'a>), String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let field = self.field();
        if field.is_err() {
            self.0 = &[];
        }
        Some(field)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
        [&[(number << 3) | 2, bytes.len() as u8], bytes].concat()
    }

    /// One matrix, `[2, 3]`, read by one node.
    fn file() -> Vec<u8> {
        let values: Vec<u8> = (1..=6).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let sizes = [1 << 3, 2, 1 << 3, 3];
        let constant = [&sizes[..], &[2 << 3, 1], &field(8, b"w"), &field(9, &values)].concat();
        let node = [field(1, b"x"), field(1, b"w"), field(3, b"/fc/MatMul")].concat();
        field(7, &[field(1, &node), field(5, &constant)].concat())
    }

    #[test]
    fn a_weight_is_found_by_its_layer_and_turned() {
        let graph = Graph::read(&file()).expect("is whole");
        let weight = graph.read_by("/fc/MatMul").expect("is there").transposed().expect("fits");
        let numbers = weight.bytes.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        assert_eq!(weight.shape, [3, 2]);
        assert_eq!(numbers.collect::<Vec<_>>(), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert!(graph.read_by("/fc2/MatMul").is_err_and(|said| said.contains("/fc2/MatMul")));
    }

    #[test]
    fn broken_files_are_refused() {
        let whole = file();
        for length in 1..whole.len() {
            assert!(Graph::read(&whole[..length]).is_err(), "{length}");
        }
        assert!(Graph::read(b"PK\x03\x04 something else").is_err());
    }
}
