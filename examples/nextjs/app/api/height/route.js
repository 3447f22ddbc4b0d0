import { readHeight } from '../../height.js'

export const dynamic = 'force-dynamic'

export async function GET() {
  try {
    return Response.json({ height: await readHeight() })
  } catch (error) {
    return Response.json({ error: [error.message, error.cause?.message].filter(Boolean).join(': ') }, { status: 502 })
  }
}
