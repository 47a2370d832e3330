//! Strided matrices over memory that is borrowed, and their product.
// The product takes raw pointers. What they may reach is checked where a matrix is made.
#![allow(unsafe_code)]

use gemm::Parallelism;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows and columns, and how far apart the elements are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl Shape {
    /// Rows one after the other.
    pub(super) fn rows(rows: usize, cols: usize) -> Self {
        Self { rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// Rows of `cols` neighbours, `stride` apart.
    pub(super) fn spaced(rows: usize, cols: usize, stride: usize) -> Self {
        Self { rows, cols, row_stride: stride, col_stride: 1 }
    }

    pub(super) fn swapped(self) -> Self {
        let Self { rows, cols, row_stride, col_stride } = self;
        Self { rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }

    /// Panics where an element lies outside of `len` numbers from `offset` on: a fault in a kernel.
    fn check(&self, offset: usize, len: usize) {
        if self.rows > 0 && self.cols > 0 {
            let last = (self.rows - 1) * self.row_stride + (self.cols - 1) * self.col_stride;
            assert!(offset + last < len, "a matrix reaches beyond its memory");
        }
    }
}

/// A matrix to read.
#[derive(Clone, Copy)]
pub(super) struct View<'a, T = f32> {
    start: *const T,
    pub(super) shape: Shape,
    memory: PhantomData<&'a [T]>,
}

impl<'a, T> View<'a, T> {
    pub(super) fn new(memory: &'a [T], offset: usize, shape: Shape) -> Self {
        shape.check(offset, memory.len());
        Self { start: memory.as_ptr().wrapping_add(offset), shape, memory: PhantomData }
    }

    pub(super) fn transposed(self) -> Self {
        Self { shape: self.shape.swapped(), ..self }
    }

    pub(super) fn width(&self) -> usize {
        self.shape.cols
    }

    pub(super) fn rows(self, rows: &Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.shape.rows, "no such rows");
        let start = self.start.wrapping_add(rows.start * self.shape.row_stride);
        Self { start, shape: Shape { rows: rows.len(), ..self.shape }, ..self }
    }

    pub(super) fn cols(self, cols: &Range<usize>) -> Self {
        self.transposed().rows(cols).transposed()
    }

    /// A row whose elements are neighbours.
    pub(super) fn row(&self, row: usize) -> &'a [T] {
        assert!(row < self.shape.rows && self.shape.col_stride == 1, "no such row");
        // SAFETY: the row lies in memory that was checked when the matrix was made.
        unsafe {
            let start = self.start.add(row * self.shape.row_stride);
            std::slice::from_raw_parts(start, self.shape.cols)
        }
    }
}

/// A matrix to write; no other matrix holds one of its elements.
pub(super) struct ViewMut<'a> {
    start: *mut f32,
    shape: Shape,
    memory: PhantomData<&'a mut [f32]>,
}

impl<'a> ViewMut<'a> {
    pub(super) fn new(memory: &'a mut [f32], shape: Shape) -> Self {
        shape.check(0, memory.len());
        Self { start: memory.as_mut_ptr(), shape, memory: PhantomData }
    }

    /// A row whose elements are neighbours.
    pub(super) fn row(&mut self, row: usize) -> &mut [f32] {
        assert!(row < self.shape.rows && self.shape.col_stride == 1, "no such row");
        // SAFETY: the row lies in memory that was checked when the matrix was made, and that no
        // other matrix holds; the borrow of `self` keeps a second row from being taken.
        unsafe {
            let start = self.start.add(row * self.shape.row_stride);
            std::slice::from_raw_parts_mut(start, self.shape.cols)
        }
    }

    pub(super) fn cols(&mut self, cols: &Range<usize>) -> ViewMut<'_> {
        assert!(cols.start <= cols.end && cols.end <= self.shape.cols, "no such columns");
        let start = self.start.wrapping_add(cols.start * self.shape.col_stride);
        ViewMut { start, shape: Shape { cols: cols.len(), ..self.shape }, memory: PhantomData }
    }
}

// SAFETY: a matrix to read is a borrow of numbers.
unsafe impl<T: Sync> Sync for View<'_, T> {}

/// Output that tasks write side by side, each at elements of its own.
pub(super) struct Parts<'a> {
    start: *mut f32,
    len: usize,
    memory: PhantomData<&'a mut [f32]>,
}

// SAFETY: memory is only reached through `Parts::view`, whose callers promise disjoint elements.
unsafe impl Sync for Parts<'_> {}

impl<'a> Parts<'a> {
    pub(super) fn new(memory: &'a mut [f32]) -> Self {
        Self { start: memory.as_mut_ptr(), len: memory.len(), memory: PhantomData }
    }

    /// One task's part.
    ///
    /// # Safety
    /// No two views that live at one time share an element.
    pub(super) unsafe fn view(&self, offset: usize, shape: Shape) -> ViewMut<'a> {
        shape.check(offset, self.len);
        ViewMut { start: self.start.wrapping_add(offset), shape, memory: PhantomData }
    }

    /// One task's numbers, which are neighbours.
    ///
    /// # Safety
    /// As [`Parts::view`].
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn numbers(&self, offset: usize, n: usize) -> &'a mut [f32] {
        assert!(offset + n <= self.len, "numbers beyond the memory");
        // SAFETY: as is promised, and they lie in memory that was borrowed for so long.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), n) }
    }
}

/// `out = scale·a·b`, or `out += scale·a·b`, on one core: inside of tasks that are many already.
pub(super) fn matmul(out: &mut ViewMut<'_>, add: bool, scale: f32, a: View<'_>, b: View<'_>) {
    let (m, k, n) = (a.shape.rows, a.shape.cols, b.shape.cols);
    assert_eq!((out.shape.rows, out.shape.cols, k), (m, n, b.shape.rows), "shapes of a product");
    if m == 0 || n == 0 || k == 0 {
        // `gemm` is not made for a sum of nothing; outputs begin as zeros, or as what is added to.
        return;
    }
    let [os, a_s, bs] =
        [out.shape, a.shape, b.shape].map(|s| (s.row_stride as isize, s.col_stride as isize));
    // SAFETY: every element lies in memory that was checked when the matrices were made; `out` is
    // borrowed alone, so that it is none of those that are read.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.start,
            os.1,
            os.0,
            add,
            a.start,
            a_s.1,
            a_s.0,
            b.start,
            bs.1,
            bs.0,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
