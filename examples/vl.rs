use bitnet_rs::{cpu::Isa, kernels::*, threads::Team};
use std::time::Instant;
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let names: Vec<&str> = a[1].split(',').collect();
    let threads: usize = a[2].parse().unwrap();
    let isa = Isa::best().unwrap();
    let team = Team::new(Some(threads)).unwrap();
    for spec in &a[3..] {
        let v: Vec<usize> = spec.split('x').map(|s| s.parse().unwrap()).collect();
        let (rows, cols, n) = (v[0], v[1], v[2]);
        let mut best = vec![f64::INFINITY; names.len()];
        team.run(|| {
            let ks: Vec<_> = names.iter().map(|n| by_name(isa, Some(n)).unwrap()).collect();
            let ws: Vec<_> = ks
                .iter()
                .map(|k| PackedMatrix::arbitrary(Kernels::of(*k), rows, cols, &team))
                .collect();
            let mut xs = vec![Prepared::default(); n];
            let mut s = 1u32;
            for x in xs.iter_mut() {
                let f: Vec<f32> = (0..cols)
                    .map(|_| {
                        let mut t = 0f32;
                        for _ in 0..4 {
                            s = s.wrapping_mul(1664525).wrapping_add(1013904223);
                            t += (s >> 8) as f32 / 16777216.0 - 0.5;
                        }
                        t
                    })
                    .collect();
                ks[0].prepare(isa, &f, x);
            }
            let mut y = vec![0f32; n * rows];
            let calls = (2e9 / (rows * cols * n) as f64).ceil() as usize;
            for _ in 0..7 {
                for (i, w) in ws.iter().enumerate() {
                    if !ks[i].table().is_empty() {
                        for x in xs.iter_mut() {
                            ks[i].build_table(x);
                        }
                    }
                    let t = Instant::now();
                    for _ in 0..calls {
                        multiply(&team, &xs, [(w, &mut y)]);
                    }
                    best[i] = best[i].min(t.elapsed().as_secs_f64() / calls as f64);
                }
            }
        })
        .unwrap();
        print!("{spec:>16}");
        for (i, n) in names.iter().enumerate() {
            print!("  {n} {:6.1}", (rows * cols) as f64 * v[2] as f64 / best[i] / 1e9 / 1.0);
        }
        println!();
    }
}
