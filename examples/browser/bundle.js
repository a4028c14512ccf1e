/* `mge.plan`: a ZIP with stored entries, which are views into one ArrayBuffer (docs/reference/bundle.md). */

const MAX_BYTES = 2 ** 30; // WebAssembly has 4 GB at most, where weights lie again, in FP32
const MAX_DOCUMENT = 2 ** 22; // bytes of JSON, as in the runtime
const SCHEMA_VERSION = 3;
const MAX_SIDE = 4096; // pixels of a frame, as in the runtime
const [END, CENTRAL, LOCAL] = [0x06054b50, 0x02014b50, 0x04034b50]; // PKWARE's APPNOTE, 4.3
const END_SIZE = 22; // bytes; a bundle has no comment behind it

/** The bytes of a Blob or File that may be a bundle. */
export async function readBundle(blob) {
  checkSize(blob.size);
  return blob.arrayBuffer();
}

export function checkSize(bytes) {
  if (bytes > MAX_BYTES) throw new Error(`it has ${bytes} bytes; expected at most ${MAX_BYTES}`);
}

export class Bundle {
  /** Throws an Error of one line where `buffer` is no bundle, or one of another version. */
  constructor(buffer) {
    try {
      this.entries = directory(buffer);
    } catch (error) {
      throw new Error(`it is cut short, damaged or no bundle (${error.message}); expected one that mge-export wrote`);
    }
    this.manifest = this.json("manifest.json");
    const { schema_version: version, graphs, preprocess } = this.manifest ?? {};
    if (version !== SCHEMA_VERSION)
      throw new Error(`it has schema version ${version}; expected ${SCHEMA_VERSION}: export again`);
    const { size, resize } = preprocess ?? {};
    const whole = Number.isInteger(size) && Number.isInteger(resize);
    const sized = whole && 2 <= size && size <= resize && size <= MAX_SIDE && resize <= 4 * size;
    if (!(Array.isArray(graphs) && graphs.length > 0 && sized))
      throw new Error(`it has ${graphs?.length} graphs for frames of ${size} of ${resize} px; expected 1 or more, 2 to ${MAX_SIDE}`);
  }

  has(name) {
    return this.entries.has(name);
  }

  /** An entry's bytes, a view, checked against their CRC-32. */
  read(name) {
    const entry = this.entries.get(name);
    if (!entry) throw new Error(`it has no entry ${name}; expected a bundle that mge-export wrote`);
    if (crc32(entry.bytes) !== entry.crc) throw new Error(`its entry ${name} is damaged: copy or export it again`);
    return entry.bytes;
  }

  /** A document, parsed. */
  json(name) {
    const bytes = this.read(name);
    if (bytes.length > MAX_DOCUMENT) throw new Error(`its ${name} has ${bytes.length} bytes; expected 4 MB at most`);
    try {
      return JSON.parse(new TextDecoder().decode(bytes));
    } catch {
      throw new Error(`its ${name} is no JSON; expected a bundle that mge-export wrote`);
    }
  }
}

/** Entries by name. DataView and Uint8Array throw RangeError where an offset leads out of the file. */
function directory(buffer) {
  const view = new DataView(buffer);
  const expect = (position, signature) => {
    if (view.getUint32(position, true) !== signature) throw new Error(`no ZIP header at byte ${position}`);
  };
  const end = buffer.byteLength - END_SIZE;
  expect(end, END);
  const entries = new Map();
  let position = view.getUint32(end + 16, true);
  for (let count = view.getUint16(end + 10, true); count > 0; count--) {
    expect(position, CENTRAL);
    const nameLength = view.getUint16(position + 28, true);
    const name = new TextDecoder().decode(new Uint8Array(buffer, position + 46, nameLength));
    if (view.getUint16(position + 10, true) !== 0) throw new Error(`entry ${name} is compressed`);
    const [crc, size] = [view.getUint32(position + 16, true), view.getUint32(position + 24, true)];
    const header = view.getUint32(position + 42, true);
    expect(header, LOCAL);
    const data = header + 30 + view.getUint16(header + 26, true) + view.getUint16(header + 28, true);
    entries.set(name, { crc, bytes: new Uint8Array(buffer, data, size) });
    position += 46 + nameLength + view.getUint16(position + 30, true) + view.getUint16(position + 32, true);
  }
  return entries;
}

const TABLE = Int32Array.from({ length: 256 }, (_, value) => {
  for (let bit = 0; bit < 8; bit++) value = (value >>> 1) ^ (value & 1 ? 0xedb88320 : 0);
  return value;
});

function crc32(bytes) {
  let crc = -1;
  for (const byte of bytes) crc = (crc >>> 8) ^ TABLE[(crc ^ byte) & 255];
  return ~crc >>> 0;
}
